"""MoCo v3's own ViT; everything else is timm's `VisionTransformer`."""

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class MoCoViT(VisionTransformer):
    """timm's ViT with fixed 2-D sine-cosine positions and MoCo v3's initialisation (Chen et al., 2021, Sec. 4.2).
    stop_grad_conv1: freeze the patch embedding at its random values, which stabilises training (Sec. 4.1)."""

    def __init__(self, *, stop_grad_conv1: bool = False, **kwargs):
        super().__init__(**kwargs)
        if self.cls_token is None or self.num_prefix_tokens != 1 or self.no_embed_class:
            raise ValueError("MoCo v3's ViT has a class token with a position and no other extra tokens")
        rows, columns = self.patch_embed.grid_size
        grid = sincos_positions(rows, columns, self.embed_dim)
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, self.embed_dim), grid])[None], requires_grad=False)

        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith("qkv"):  # query, key and value are separate layers
                bound = math.sqrt(6 / (module.out_features // 3 + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        patches = self.patch_embed.proj
        bound = math.sqrt(6 / (patches.weight[0].numel() + self.embed_dim))
        nn.init.uniform_(patches.weight, -bound, bound)
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        patches.requires_grad_(not stop_grad_conv1)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width]: sine and cosine of the row, then of the column, times 10000^-(4 k / width)."""
    if width % 4:
        raise ValueError(f"embed_dim must be divisible by 4 for sine-cosine positions, not {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [index.flatten()[:, None] * frequencies for index in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
