"""The part of vLLM that keeps a list of compiled code in a file."""


class CompilerManager:
    def __init__(self, cache_file_path: str, cache: dict[int, str]) -> None:
        self.cache_file_path, self.cache = cache_file_path, cache

    def save_to_file(self) -> None:
        if self.cache:
            with open(self.cache_file_path, "w") as file:
                for entry in self.cache.values():
                    file.write(f"{entry}\n")
                    file.flush()
