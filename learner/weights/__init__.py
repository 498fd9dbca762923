"""The weight store: published policy versions, on the host or on a device."""
