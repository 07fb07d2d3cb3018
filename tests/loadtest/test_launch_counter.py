"""The counter on small functions: what counts as a launch, and what the host would wait for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from loadtest.launch_counter import HostWait, LaunchCounter, Launches

DEVICE = torch.device("cpu")  # named, as a GPU would be


def launches_of(run: Callable[[Tensor], object]) -> Launches:
    """Of a function of a float32 [4, 6] on the device."""
    matrix = torch.arange(24.0).view(4, 6)  # before the counter: device memory
    with torch.inference_mode(), LaunchCounter() as counter, counter.counting() as launches:
        run(matrix)
    return launches


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x.view(6, 4).t()[1:].unsqueeze(0).expand(2, -1, -1), {}),
        (lambda x: (torch.empty_like(x), x.new_empty(3), torch.empty(3, device=DEVICE)), {}),
        (lambda x: x + 1, {"add": 1}),
        (lambda x: x.copy_(x + x), {"add": 1, "copy_": 1}),
        (lambda x: torch.nn.functional.linear(x, x), {"mm": 1}),
        (lambda x: x.to(torch.float16), {"_to_copy": 1}),
        (lambda x: x.to(DEVICE), {}),
        (lambda x: x.t().reshape(-1), {"clone": 1}),
        (lambda x: torch.zeros(3, device=DEVICE), {"zeros": 1}),
        (lambda x: x[torch.zeros(2, dtype=torch.long, device=DEVICE)], {"zeros": 1, "index": 1}),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(*(x[None, None],) * 3),
         {"scaled_dot_product_attention": 1}),
    ],
)  # fmt: skip
def test_every_operation_but_views_and_allocations_is_a_launch(
    run: Callable[[Tensor], object], expected: dict[str, int]
) -> None:
    assert dict(launches_of(run).operations) == expected


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (lambda x: x[0, 0].item(), "_local_scalar_dense"),
        (lambda x: int(x[0, 0]), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: np.asarray(x), "__array__"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.to("cpu"), "Tensor.to"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.where(x > 1), "nonzero"),
        (lambda x: x[x > 1], "index by a mask"),
        (lambda x: x.__setitem__(x > 1, 0.0), "index_put_ by a mask"),
        (lambda x: x.masked_select(x > 1), "masked_select"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.long().flatten().bincount(), "bincount"),
        (lambda x: x.repeat_interleave(x[0, :4].long(), dim=0), "repeat_interleave"),
        (lambda x: x[[0, 1]], "indexing by a list"),
        (lambda x: x[np.array([0, 1])], "indexing by a list"),
        (lambda x: torch.tensor([1, 2], device=DEVICE), "torch.tensor"),
        (lambda x: x.new_tensor([1, 2]), "new_tensor"),
        (lambda x: torch.tensor([1, 2]).to(DEVICE), "Tensor.to without non_blocking"),
        (lambda x: torch.from_numpy(np.zeros(3)).to(DEVICE), "Tensor.to without non_blocking"),
        (lambda x: x.copy_(torch.zeros(4, 6)), "copy_ without non_blocking"),
        (lambda x: torch.zeros(4, 6).copy_(x), "copy_ without non_blocking"),
    ],
)  # fmt: skip
def test_what_waits_for_the_device_is_refused_by_name(
    run: Callable[[Tensor], object], what: str
) -> None:
    with pytest.raises(HostWait, match=what):
        launches_of(run)


def test_copies_that_do_not_wait_count_once_and_are_memory_of_their_own() -> None:
    def exchange(x: Tensor) -> None:
        rows = torch.from_numpy(np.ones((4, 6), np.float32))
        on_device = rows.to(DEVICE, non_blocking=True)
        x.copy_(rows, non_blocking=True)
        ids = torch.empty(4, 6)
        ids.copy_(on_device + x, non_blocking=True)
        assert ids.tolist()[0][0] == 2.0  # on a GPU after an event
        rows[0, 0] = 5.0
        with pytest.raises(HostWait):
            on_device.tolist()

    launches = launches_of(exchange)
    assert launches.operations == {"copy_": 3, "add": 1}


def test_work_on_the_host_is_no_launch() -> None:
    def plan(x: Tensor) -> None:
        lengths = torch.tensor([3, 1, 2])
        first = lengths.cumsum(0) - lengths
        assert first.tolist() == [0, 3, 4] and lengths[lengths > 1].sum().item() == 5

    assert launches_of(plan).total == 0


def test_host_memory_that_meets_the_device_counts_as_uploaded_once() -> None:
    def run(x: Tensor) -> None:
        ids = torch.tensor([1, 2])
        x.index_select(0, ids)
        x.index_select(0, ids)

    assert launches_of(run).operations == {"upload": 1, "index_select": 2}


def test_nothing_is_refused_or_counted_outside_of_counting() -> None:
    matrix = torch.ones(2, 2)
    with LaunchCounter() as counter:
        assert matrix.sum().item() == 4
        with counter.counting() as launches:
            matrix + 1
        assert matrix.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert launches.total == 1
