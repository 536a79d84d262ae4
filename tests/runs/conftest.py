"""The finished runs that the exports have too."""

from tests.export.conftest import classifier as classifier
from tests.export.conftest import colour_classifier as colour_classifier
from tests.export.conftest import colour_workdir as colour_workdir
from tests.export.conftest import colours as colours
from tests.export.conftest import workdir as workdir
