import hotset


@hotset.function(gpu_memory="8MiB")
class Shout:
    """Says it louder."""

    def predict(self, text: str) -> str:
        return text.upper() + "!"
