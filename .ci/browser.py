"The Chromium (or Chrome) of this machine: `python .ci/browser.py` prints its path, and fails where there is none."
import os
import shutil
import sys

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def find():
    return next(filter(None, map(shutil.which, NAMES)), MAC if os.path.exists(MAC) else None)


if __name__ == "__main__": print(path := find()); sys.exit(not path)
