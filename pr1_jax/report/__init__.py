"""A run as one page to look at: `report.html`.

`reading` reads a workdir, `figures` names what is drawn, `events` finds what happened,
`traces` picks responses, `history` keeps the analyses of every step, `differences`
compares configs, `page` puts it all into one file, and `updates` does so while a run
trains. What the page does in a browser is in the folder `assets`.
"""
