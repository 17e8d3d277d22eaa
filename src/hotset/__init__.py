"""hotset: Function-as-a-Service for ML inference on GPUs. Many models, few GPUs."""

__version__ = "0.1.0"
