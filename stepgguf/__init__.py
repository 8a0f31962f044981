"""stepgguf: Step-3.5-Flash from safetensors to a GGUF that fits a workstation, and running it there."""

__version__ = "0.1.0"
