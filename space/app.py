"""The demo as a Hugging Face Space: the page that `kn-zoo demo` serves."""

from kn_zoo.demo import build, launch

if __name__ == "__main__":
    launch(build())
