"Settings of all tests: nothing random from run to run, and no window for a plot"
import os

os.environ.setdefault('MPLBACKEND', 'agg')

from hypothesis import settings

settings.register_profile('fastxtend', derandomize=True, deadline=None, print_blob=True)
settings.load_profile('fastxtend')
