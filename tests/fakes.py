"""What fake generators share: all of :class:`dd.generators.base.Generator`, by random numbers.
Starts without torch."""

import numpy as np


class RandomGenerator:
    """Random images and heat, by the seed of each sample. As with a real one, what a sample gets
    depends in its last digits on the samples it is made together with.

    ``sources``: of the heat; ``powers`` and ``side``: of each of its maps.
    """

    token_limit, device, size = 77, "cpu", 16
    terms = {"licence": "Apache-2.0", "link": None}
    sources, powers, side = ("class_prompt",), 2, 4

    def identity(self):
        return {
            "model": "fake",
            "revision": None,
            "weights_sha256": "0" * 64,
            "scheduler": None,
            "steps": 1,
            "guidance": 3.0,
        }

    def where_read(self):
        return [{"name": "everywhere", "kind": "joint", "heads": 1, "side": 8}]

    def token_count(self, text):
        return len(text.split()) + 2

    def spans(self, sample):
        return {source: [[1]] * len(sample.classes) for source in self.sources}

    def generate(self, samples, capture=True):
        together = sum(s.seed for s in samples) % 2**32
        images, heat = [], []
        for sample in samples:
            rng, digits = (np.random.default_rng(s) for s in (sample.seed, [sample.seed, together]))
            image = rng.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
            images.append(image & 254 | digits.integers(0, 2, image.shape, dtype=np.uint8))
            maps = self._maps(sample, rng)
            heat.append({k: v + 1e-6 * digits.random(v.shape) for k, v in maps.items()})
        return np.stack(images), heat if capture else [], [None] * len(samples)

    def read_real(self, images, samples, timesteps, seed=0):
        """By the pixels of an image, the words that it is shown with, and the noise."""
        shape = len(samples), self.size, self.size, 3
        assert images.shape == shape and images.dtype == np.uint8
        each = zip(images, samples, strict=True)
        noise = [seed, *timesteps]
        return [self._maps(s, np.random.default_rng([int(i.sum()), *noise])) for i, s in each]

    def largest_batch(self, sample):
        return 4

    def _maps(self, sample, rng):
        shape = len(sample.classes), self.powers, self.side, self.side
        return {source: rng.random(shape) for source in self.sources}
