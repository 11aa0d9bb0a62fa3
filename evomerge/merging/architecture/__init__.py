"""What a model is made of: its layers, what stands before, after and outside of them."""
