"""What every generator promises (:class:`dd.generators.base.Generator`), real or fake."""

import json
from dataclasses import replace

import numpy as np

from dd.masks.from_heat import SOURCES

PARTS = ("device", "size", "terms", "token_limit")


def alike(one, other):
    """Whether two images are the same but for the last digits of other batches."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 2


def check_identity(generator):
    identity = generator.identity()
    assert json.loads(json.dumps(identity)) == identity == generator.identity()
    assert type(identity["weights_sha256"]) is str and len(identity["weights_sha256"]) == 64


def check_sites(generator):
    sites = generator.where_read()
    assert sites and json.loads(json.dumps(sites)) == sites
    for site in sites:
        assert site.keys() == {"name", "kind", "heads", "side"}
        assert site["kind"] in ("cross", "self", "joint") and site["side"] > 0


def check_tokens(generator, samples):
    limit = generator.token_limit
    assert type(limit) is int and 0 < generator.token_count("") < limit
    for sample in samples:
        count = generator.token_count(sample.prompt)
        assert type(count) is int and generator.token_count("") < count <= limit
        assert generator.token_count(f"{sample.prompt} and {sample.prompt}") > count
    assert generator.token_count("a red thing " * limit) > limit  # nothing is cut off


def check_spans(generator, samples):
    for sample in samples:
        spans = generator.spans(sample)
        assert spans and spans.keys() <= set(SOURCES)
        for places in spans.values():
            assert len(places) == len(sample.classes) and all(places)
            assert all(type(at) is int and at >= 0 for span in places for at in span)


def check_heat(generator, samples, heat):
    """Finite maps of each class of each source that is spanned, all of one number of powers and
    one side."""
    assert len(heat) == len(samples)
    forms = set()
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == generator.spans(sample).keys()
        for stored in maps.values():
            assert stored.dtype == np.float64 and stored.ndim == 4 and np.isfinite(stored).all()
            assert len(stored) == len(sample.classes) and stored.shape[2] == stored.shape[3]
            forms.add(stored.shape[1:])
    assert len(forms) == 1


def check_drawing(generator, samples):
    size = generator.size
    assert len(samples) > 1 and type(size) is int
    images, heat, bad = generator.generate(samples)
    assert images.shape == (len(samples), size, size, 3) and images.dtype == np.uint8
    assert bad == [None] * len(samples)
    check_heat(generator, samples, heat)
    plain, nothing, bad = generator.generate(samples, capture=False)
    assert plain.tobytes() == images.tobytes() and nothing == [] and bad == [None] * len(samples)
    again, same, _ = generator.generate(samples)
    assert again.tobytes() == images.tobytes()
    for one, other in zip(heat, same, strict=True):
        assert all(one[source].tobytes() == other[source].tobytes() for source in one)


def check_noise(generator, samples):
    """It comes from a sample's own seed: not from its place, nor from others of the batch."""
    images, heat, _ = generator.generate(samples)
    turned, others, _ = generator.generate(samples[::-1])
    alone, single, _ = generator.generate(samples[:1])
    changed, _, _ = generator.generate([samples[0], *(replace(s, seed=9) for s in samples[1:])])
    for found in (turned[-1], alone[0], changed[0]):
        assert alike(images[0], found)
    for maps in (others[-1], single[0]):
        for source, stored in heat[0].items():
            np.testing.assert_allclose(maps[source], stored, rtol=2e-3, atol=1e-5)
    assert not alike(images[1], changed[1])
    (other,), _, _ = generator.generate([replace(samples[0], seed=9)])
    assert not alike(images[0], other)


def check_reading(generator, samples, images, timesteps):
    images = generator.generate(samples)[0] if images is None else images
    before = images.copy()
    heat = generator.read_real(images, samples, list(timesteps), seed=1)
    check_heat(generator, samples, heat)
    assert np.array_equal(images, before)
    again = generator.read_real(images, samples, list(timesteps), 1)
    for one, other in zip(heat, again, strict=True):
        assert all(one[source].tobytes() == other[source].tobytes() for source in one)


def check_batch(generator, samples):
    found = generator.largest_batch(samples[0])
    assert type(found) is int and found >= 1


def check(generator, samples, images=None, timesteps=(50, 150)):
    """All of it. ``samples``: two or more, of different seeds; ``images``: those that are read,
    None = those that are drawn."""
    missing = [name for name in PARTS if not hasattr(generator, name)]
    assert not missing and type(generator.device) is str
    terms = dict(generator.terms)
    assert terms.keys() <= {"licence", "link"} and all(
        v is None or type(v) is str for v in terms.values()
    )
    check_identity(generator)
    check_sites(generator)
    check_tokens(generator, samples)
    check_spans(generator, samples)
    check_drawing(generator, samples)
    check_noise(generator, samples)
    check_reading(generator, samples, images, timesteps)
    check_batch(generator, samples)
