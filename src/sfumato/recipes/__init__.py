"""Recipes of pictures: written into files, and read out of those of this package, of A1111 and of ComfyUI."""
