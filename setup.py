"The part of the package metadata that pyproject.toml calls dynamic, from settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

statuses = ['0 - None', '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
pythons = ['3.10', '3.11', '3.12', '3.13']

extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['all'] = sorted({o for reqs in extras.values() for o in reqs})
url = cfg['git_url']
urls = {'Repository': url, 'Issues': f'{url}/issues', 'Changelog': f'{url}/blob/main/CHANGELOG.md'} if url else {}

setup(
    version=cfg['version'],
    license='Apache-2.0',
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])]}",
        *(f"Intended Audience :: {o}" for o in cfg['audience'].split(', ')),
        f"Natural Language :: {cfg['language']}",
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: {o}' for o in pythons[pythons.index(cfg['min_python']):]),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Software Development :: Libraries :: Python Modules',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['fastxtend', 'fastxtend.*']),
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    entry_points={'nbdev': ['fastxtend=fastxtend._modidx:d'], 'console_scripts': cfg['console_scripts'].split()},
    package_data={'': ['*.pyi'], 'fastxtend': ['py.typed']},
    project_urls=urls,
    zip_safe=False,
)
