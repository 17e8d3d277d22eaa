"""The Datastore: functions, bundles, environments and learned profiles, which survive a restart.

``Datastore`` (datastore.py) is the interface to the records and ``SqliteDatastore`` (sqlite.py) its embedded form.
``Bundles`` (bundles.py) holds the code of functions and ``Environments`` (environments.py) what they import.
"""
