"""A custom search method: go through the networks one gene away from the best one so far."""

from collections.abc import Iterator

from glit_models.search import Search

from glit_models import Spec


class LocalSearch(Search):
    """Each generation holds neighbours of the best network; random networks fill what they leave."""

    method = "local"
    description = "Local search: the networks that differ in one gene from the best one so far."

    def propose(self) -> None:
        if self.best is not None:
            neighbours = self._shuffled(self.best.spec)
            self.add_children("neighbour", self.config.population, lambda: next(neighbours, self.best.spec))
        self.add_random()

    def _shuffled(self, spec: Spec) -> Iterator[Spec]:
        left = list(self.space.neighbours(spec))
        while left:
            yield left.pop(int(self.rng.random() * len(left)))
