import numpy as np
import pytest

from core.data.sampling import held_out, mix, shuffled


def test_mix_gives_the_published_sequence_of_splitmix64():
    # Seed 1234567: the reference outputs that accompany the algorithm; state k is the seed plus k golden ratios.
    states = np.array([(1234567 + k * 0x9E3779B97F4A7C15) % 2**64 for k in range(5)], dtype=np.uint64)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("size", [*range(1, 70), 100, 255, 256, 257, 1000, 4095, 4097, 65_537])
def test_shuffled_is_a_bijection(size):
    places = shuffled(np.arange(size), size, seed=7, epoch=3)
    assert np.array_equal(np.sort(places), np.arange(size))


def test_shuffled_differs_by_epoch_and_seed_and_depends_on_nothing_else():
    index = np.arange(1000)
    orders = [shuffled(index, 1000, seed=s, epoch=e) for s in (0, 1, -1, 2**63) for e in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == len(orders)
    again = np.concatenate([shuffled(index[i : i + 7], 1000, seed=1, epoch=2) for i in range(0, 1000, 7)])
    assert np.array_equal(again, orders[5])


def test_shuffled_visits_every_place_equally_often():
    # Index 0 over 1,500 epochs of 6 windows: each place is expected 250 times, with a standard deviation of 14.4.
    counts = np.zeros(6)
    for epoch in range(1500):
        counts[shuffled(np.array([0]), 6, seed=0, epoch=epoch)] += 1
    assert np.all(np.abs(counts - 250) < 72)
    # Neighbours must not stay neighbours: in a random order of n, one pair is expected to.
    order = shuffled(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert np.sum(np.diff(order) == 1) < 8


def test_shuffled_needs_no_list_of_a_billion_windows():
    places = shuffled(np.array([0, 10**12 - 1]), 10**12, seed=0, epoch=0)
    assert np.all((0 <= places) & (places < 10**12))


def test_held_out_is_a_pure_function_of_the_document():
    whole = held_out(0, 5000, 0.1)
    parts = [held_out(i, 50, 0.1) for i in range(0, 5000, 50)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert 400 < whole.sum() < 600


def test_held_out_gives_two_documents_one_each():
    assert held_out(0, 2, 0.001).tolist() == [False, True]
    assert held_out(0, 2, 0.999).tolist() == [False, True]
    assert not held_out(0, 1000, 0.0).any()
    assert np.all(held_out(0, 5000, 0.1) <= held_out(0, 5000, 0.2))
