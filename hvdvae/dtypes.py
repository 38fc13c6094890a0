"""Dtypes by the names that messages carry them under, such as "torch.float32": nothing else is made from a message."""

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = {str(kind): kind for kind in (*FLOATS, *WHOLE)}
