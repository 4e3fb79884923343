"""What MILD adds to a UNet, each part for itself and all of them together."""
