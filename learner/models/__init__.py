"""Policy and critic: attention, output layer, LoRA adapters, and faster layers for CPUs."""
