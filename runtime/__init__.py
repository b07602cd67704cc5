"""What users touch: images, signatures, the runtime, enclaves and the command line. The upper floor."""
