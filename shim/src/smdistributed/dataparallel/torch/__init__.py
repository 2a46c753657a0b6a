"""PyTorch: `torch_smddp` registers the backend; `distributed` and `parallel` are the API of SMDDP 1.x."""
