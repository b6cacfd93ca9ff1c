"""run.py STORY: runs the function of that name. The environment is main.rs's."""
import importlib
import pathlib
import sys

for file in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    if file.stem != 'run' and hasattr(module := importlib.import_module(file.stem), sys.argv[1]):
        getattr(module, sys.argv[1])()
        break
else:
    sys.exit(f'no story {sys.argv[1]}')
