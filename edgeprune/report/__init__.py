"""`report`: one page of HTML from what other commands wrote: manifests, timings, comparisons.

Files are found and read (sources), tables and figures are made of them (sections), and all becomes
one page without scripts, links or fonts of its own (page, html). What the files say may come from
anybody: numbers are read by type and range, every text is escaped.
"""
