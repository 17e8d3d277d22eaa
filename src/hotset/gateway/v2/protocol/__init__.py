"""The protocol's gRPC messages. ``messages.py`` has them as classes, ``open_inference.proto`` says what they are."""
