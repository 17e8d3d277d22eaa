"""The GPU Manager of one machine, and the code that runs inside its GPU processes."""
