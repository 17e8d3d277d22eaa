"""The Open Inference Protocol's messages: ``open_inference.proto`` describes them, ``messages.py`` has the classes."""
