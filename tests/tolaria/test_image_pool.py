from __future__ import annotations

import threading

import pytest

from tolaria.images import ImagePool, Lease, StateImage
from tolaria.values.training import Position


def new_image() -> StateImage:
    """An image without tensors."""
    return StateImage(Position(1, 1), (), {}, b"{}")


def test_a_lease_is_released_once() -> None:
    """The callback runs at the first release only, explicit or at the end of the block."""
    released: list[int] = []
    lease = Lease(new_image(), lambda: released.append(1))
    with lease as image:
        assert image is lease.image
        assert released == []
    lease.release()
    assert released == [1]


def test_an_image_is_taken_once() -> None:
    """Taking removes the image from the pool and leaves its lease open."""
    pool, image, released = ImagePool(), new_image(), list[int]()
    image_id = pool.put(Lease(image, lambda: released.append(1)))
    lease = pool.take(image_id)
    assert (lease.image, released, len(pool)) == (image, [], 0)
    with pytest.raises(KeyError):
        pool.take(image_id)
    lease.release()
    assert released == [1]


def test_ids_are_never_reused() -> None:
    """Also after an image was taken or discarded."""
    pool = ImagePool()
    first = pool.put(new_image())
    pool.discard(first)
    assert pool.put(new_image()) != first


def test_discarding_releases_the_lease() -> None:
    """Unknown ids, and ids of images that were taken, are ignored."""
    pool, released = ImagePool(), list[int]()
    image_id = pool.put(Lease(new_image(), lambda: released.append(1)))
    pool.discard(image_id)
    pool.discard(image_id)
    pool.discard(99)
    assert (released, len(pool)) == ([1], 0)


def test_threads_share_a_pool() -> None:
    """Images that several threads put all arrive under different ids."""
    pool, ids = ImagePool(), list[int]()

    def put_many() -> None:
        ids.extend(pool.put(new_image()) for _ in range(200))

    threads = [threading.Thread(target=put_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == len(pool) == 800
