def save_folder(*a, **k): pass
