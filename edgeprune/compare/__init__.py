"""`compare`: methods and ratios side by side, what each answers right and how long it takes.

A cell is a method at a ratio. Its bundle is made (bundles), asked (answers), and at the end all
bundles are timed in turn (timing). Each step leaves a file that the next run finds (store), so a
run that was stopped goes on where it was. Results become tables (results) and a figure (figure).
This is the one package that knows both export and runtime; neither knows the other.
"""
