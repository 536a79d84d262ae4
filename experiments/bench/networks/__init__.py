"""Networks that others know, in one file for each framework.

Each is written as users of the framework would, with its initializers and other defaults. The
defaults differ: Flax approximates GELU, and PyTorch pads both sides where a stride is 2.
"""

ARCHS = ("mlp", "lenet5", "small_resnet", "mobilenet_like", "convnext_like", "small_vit")
