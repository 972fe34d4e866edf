from tests.fit.conftest import images, victim

__all__ = ["images", "victim"]
