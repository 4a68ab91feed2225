"""Starts an SDAR model from LLaDA's weights so that it computes nearly the same.

SDAR normalises every head's query and key, LLaDA does not. Heads twice as wide undo that: the
dimensions added to a head are fitted so that its length is nearly the same for all tokens. The norm
then divides by almost a constant, which its weight multiplies back. The key's norm has weight zero
at the added dimensions, so they do not enter the products.

A head of twice the width has LLaDA's rotary frequencies at every second pair; its dimensions go
there.
"""

from collections.abc import Mapping

import torch

#: The squared length that all heads get, over the 99th percentile of the lengths in LLaDA.
ROOM = 1.2


def places(width: int) -> torch.Tensor:
    """Where the dimensions of a head of `width` go in one twice as wide."""
    pair = torch.arange(width // 2)
    return torch.cat([2 * pair, 2 * pair + width])


@torch.no_grad()
def inputs(donor: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters the query projection of each layer, [tokens, hidden], by the layer's name."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)})
        )
        for name, module in donor.named_modules()
        if name.endswith("q_proj")
    ]
    donor(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name.removesuffix(".q_proj"): value for name, value in seen.items()}


def fill_up(
    x: torch.Tensor, energy: torch.Tensor, level: float, width: int, steps: int
) -> torch.Tensor:
    """Added rows [heads, width, hidden] that bring each head's squared length near `level`.

    `x` [tokens, hidden] is what the projection reads, `energy` [tokens, heads] the squared length
    of each head without the added rows.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = (1 - energy / level).clamp(min=0.0)
    rows = torch.randn(energy.shape[1], width, x.shape[1], generator=generator)
    with torch.enable_grad():
        made = (x @ rows.flatten(0, 1).T).square().mean() * width
        rows = (rows / made.sqrt()).requires_grad_()
        adam = torch.optim.Adam([rows], lr=0.03 * float(rows.detach().std()))
        for _ in range(steps):
            got = (x @ rows.flatten(0, 1).T).square().unflatten(1, rows.shape[:2]).sum(2)
            loss = (got - wanted).square().mean()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    return rows.detach() * level**0.5


@torch.no_grad()
def widen(
    donor: torch.nn.Module,
    model: torch.nn.Module,
    ids: torch.Tensor,
    heads: int,
    width: int,
    steps: int = 150,
) -> None:
    """Copy the donor's attention into `model`, whose heads are twice as wide.

    `ids` [rows, length] are texts of the donor, some tokens masked; `steps` is how long the added
    dimensions are fitted to them.
    """
    given, state = donor.state_dict(), model.state_dict()
    place = places(width)
    spare = torch.ones(2 * width, dtype=torch.bool)
    spare[place] = False
    for name, x in inputs(donor, ids).items():
        for part in ("q", "k"):
            weight = given[f"{name}.{part}_proj.weight"].unflatten(0, (heads, width))
            energy = (x @ weight.flatten(0, 1).T).square().unflatten(1, (heads, width)).sum(2)
            level = ROOM * float(energy.flatten().quantile(0.99))
            wide = torch.zeros(heads, 2 * width, x.shape[1])
            wide[:, place] = weight
            wide[:, spare] = fill_up(x, energy, level, width, steps)
            state[f"{name}.{part}_proj.weight"].copy_(wide.flatten(0, 1))
            # The product of queries and keys is divided by the root of the head's width.
            scale = torch.full((2 * width,), (level / (2 * width)) ** 0.5 * 2**0.25)
            if part == "k":
                scale[spare] = 0.0
            state[f"{name}.{part}_norm.weight"].copy_(scale)
        _spread_values(name, given, state, heads, width)


def _spread_values(
    name: str,
    given: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    heads: int,
    width: int,
) -> None:
    """Copy values and output; the values added count nothing until they are trained."""
    value = state[f"{name}.v_proj.weight"].unflatten(0, (heads, 2 * width))
    value[:, :width] = given[f"{name}.v_proj.weight"].unflatten(0, (heads, width))
    out = torch.zeros_like(state[f"{name}.o_proj.weight"]).unflatten(1, (heads, 2 * width))
    out[:, :, :width] = given[f"{name}.o_proj.weight"].unflatten(1, (heads, width))
    state[f"{name}.o_proj.weight"].copy_(out.flatten(1, 2))
