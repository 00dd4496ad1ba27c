def translate(settings, **k):
    raise NotImplementedError
