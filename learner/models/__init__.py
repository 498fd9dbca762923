"""Policy and critic: attention, output layer, adapters, faster layers."""
