"""Features of one step used again in the next ones: the deep levels of a U-Net, the later blocks of a transformer.

`reuse(net)` lets a network look into the memos of its condition (`Cond.memo`), and returns what takes that away again.
Without memos, and with gradients on, it computes as it always does. All state is in the memos, which belong to a run.

B batch, C channels, H W height and width, L tokens of the picture, K of the text, D width, E width of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.cond import Cond, Memo
from sfumato.models.mmdit import MMDiT
from sfumato.models.unet import DownBlock, UNet, UpBlock
from sfumato.prepare import Way

SHALLOW = 2  # layers of a U-Net on the way up, the last ones, that are always run


def reuse(net: nn.Module) -> Callable[[], None]:
    """Let a network keep what its condition's memos allow; nothing is done where it was done before.

    Raises ValueError for a network that cannot, see `able`.
    """
    why = able(net)
    if why:
        raise ValueError(f"nothing to keep from step to step: {why}")
    if "forward" in net.__dict__:
        return lambda: None
    way = Levels(net) if isinstance(net, UNet) else Blocks(cast(MMDiT, net))
    object.__setattr__(net, "forward", way)

    def undo() -> None:
        net.__dict__.pop("forward", None)

    return undo


def able(net: nn.Module) -> str:
    """Why a network cannot use features again; "" where it can."""
    if isinstance(net, UNet):
        return "" if len(net.config.block_out_channels) > 1 else "this U-Net has one level only"
    if isinstance(net, MMDiT):
        return "" if net.config.num_layers > 1 else "this transformer has one block only"
    return f"{type(net).__name__} is neither a U-Net nor a transformer"


class Levels(Way[UNet]):
    """A U-Net whose deep part is computed in some steps only (Ma et al. 2023, DeepCache).

    The deep part is all between the first layers of the way down and the last ones of the way up. What it hands to
    those is kept in the memos; where these say that nothing is to be fresh, only the layers outside of it are run.
    """

    def __call__(self, x: Tensor, t: Tensor | float, cond: Cond) -> Tensor:
        """The U-Net's own."""
        memos = cond.memo
        if memos is None or torch.is_grad_enabled():
            return self.plain(x, t, cond)
        net = self.module
        x, temb, context = net.entered(x, t, cond)  # (B, C_0, H, W)
        first, last = self.outermost()
        outside = min(SHALLOW, len(last.resnets))
        skips = [x]
        for i in range(outside - 1):
            x = first.layer(i, x, temb, context)  # (B, C_0, H, W)
            skips.append(x)
        if any(memo.fresh or memo.kept is None for memo in memos):
            x = self.deep(x, temb, context, outside, skips)
            keep(memos, x)
        else:
            x = kept(memos)
        for i in range(len(last.resnets) - outside, len(last.resnets)):
            x = last.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context)  # (B, C_0, H, W)
        return net.conv_out(net.conv_norm_out(x))  # (B, C_out, H, W)

    def deep(self, x: Tensor, temb: Tensor, context: Tensor | None, outside: int, above: Sequence[Tensor]) -> Tensor:
        """All between: (B, C_0, H, W) to what the last `outside` layers on the way up go on with, as large."""
        net = self.module
        first, last = self.outermost()
        skips = list(above)
        for i in range(outside - 1, len(first.resnets)):
            x = first.layer(i, x, temb, context)
            skips.append(x)
        for downsampler in first.downsamplers:
            x = downsampler(x)  # (B, C_0, H / 2, W / 2)
            skips.append(x)
        for down in list(net.down_blocks)[1:]:
            x, left = down(x, temb, context)
            skips += left
        x = net.mid_block(x, temb, context)  # (B, C_last, H / f, W / f)
        for up in list(net.up_blocks)[:-1]:
            x = up(x, skips, temb, context)  # at the end (B, C_1, H, W)
        for i in range(len(last.resnets) - outside):
            x = last.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context)  # (B, C_0, H, W)
        return x

    def outermost(self) -> tuple[DownBlock, UpBlock]:
        """The levels of the full size, on the way down and on the way up."""
        return cast(DownBlock, self.module.down_blocks[0]), cast(UpBlock, self.module.up_blocks[-1])


class Blocks(Way[MMDiT]):
    """A transformer whose blocks after the first are computed where the first one's change has become another.

    What the first block adds to the picture's tokens is compared with what it added when the others were computed last,
    by the mean of absolute values (as in ParaAttention's first-block cache; cf. TeaCache, Liu et al. 2024). Below the
    memos' limit, what the others added then is added again. The rows of one run decide together, so that prompt and
    negative prompt stay comparable; those of other runs do not count.
    """

    def __call__(self, x: Tensor, t: Tensor | float, cond: Cond) -> Tensor:
        """The transformer's own."""
        memos = cond.memo
        if memos is None or torch.is_grad_enabled():
            return self.plain(x, t, cond)
        net = self.module
        size = x.shape[2:]
        before, context, temb = net.entered(x, t, cond)  # (B, L, D), (B, K, D), (B, D)
        h, context = net.transformer_blocks[0](before, context, temb)
        added = h - before  # (B, L, D)
        due = self.due(memos, added)
        if due:
            told = h, context, temb
            inner, context, part = told if len(due) == len(memos) else (tensor[due] for tensor in told)
            for block in list(net.transformer_blocks)[1:]:
                inner, context = block(inner, context, part)
            for row, i in enumerate(due):
                memos[i].kept = added[i], inner[row] - h[i]
        return net.left(h + torch.stack([memo.kept[1] for memo in memos]), temb, size)

    def due(self, memos: Sequence[Memo], added: Tensor) -> list[int]:
        """The rows for which the other blocks are to be computed."""
        runs = {id(memo.run) for memo, now in zip(memos, added, strict=True) if not same(memo, now)}
        return [i for i, memo in enumerate(memos) if id(memo.run) in runs]


def same(memo: Memo, added: Tensor) -> bool:
    """Whether what a block added (L, D) is within the memo's limit of what it added when more was computed last."""
    if memo.fresh or memo.kept is None:
        return False
    then = memo.kept[0]
    return bool((added - then).abs().mean() < memo.limit * then.abs().mean())


def keep(memos: Sequence[Memo], rows: Tensor) -> None:
    """A row for each memo, all of one tensor."""
    for i, memo in enumerate(memos):
        memo.kept = rows, i


def kept(memos: Sequence[Memo]) -> Tensor:
    """The rows again: the same tensor where the memos are the same, in the same order."""
    whole: Any = memos[0].kept[0]
    if len(whole) == len(memos) and all(memo.kept[0] is whole and memo.kept[1] == i for i, memo in enumerate(memos)):
        return whole
    return torch.cat([memo.kept[0][memo.kept[1] : memo.kept[1] + 1] for memo in memos])
