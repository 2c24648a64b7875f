"""Pictures: files and archives in, square views as tensors out.

`sources` knows where pictures lie, `pixels` turns their bytes into 8-bit RGB and tensors in [-1, 1] and back,
and `views` cuts what training and evaluation see of each picture.
"""
