"""How fast images are read, and how long training waits for them: which of the two the other waits for."""


class Pace:
    """Seconds that reading images took, and that the reader's user waited for them.

    Args:
        workers: processes that read at the same time; 0 where the user reads itself.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.images, self.reading, self.waiting = 0, 0.0, 0.0

    def add(self, images: int, reading: float, waiting: float) -> None:
        """Counts a batch: seconds in the process that read it, and until its user had it."""
        self.images, self.reading, self.waiting = self.images + images, self.reading + reading, self.waiting + waiting

    def speeds(self, elapsed: float, processes: int = 1) -> dict[str, float]:
        """Images a second of the reading alone and of the training alone, of all processes.

        Args:
            elapsed: seconds since the first batch was asked for, reading and training together.
            processes: that read and train as this one does.
        """
        found = {}
        if self.reading > 0:
            found["data_images_per_second"] = processes * self.images * max(1, self.workers) / self.reading
        if elapsed > self.waiting:
            found["step_images_per_second"] = processes * self.images / (elapsed - self.waiting)
        return found
