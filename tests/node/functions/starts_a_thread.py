"""A module that must not be in a zygote."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
