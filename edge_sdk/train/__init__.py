"""Training on the device; the only room of the SDK that imports torch."""
