"""The finished run that the exports have too."""

from tests.export.conftest import classifier as classifier
from tests.export.conftest import workdir as workdir
