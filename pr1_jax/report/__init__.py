"""A run as one page to look at, `report.html`, and as one picture, `curves.png`.

May import the method, answers, data (for how a task concludes), workdir, system and
defaults. What the page does in a browser is in the folder `assets`.
"""
