"""Store: a directory of activations whose rows are tokens, in formats that other tools open.

    manifest     records of a store, read and written strictly     reader   Store, arrays, rows
    token_table  columns and files of tokens                       maps     memory maps of a site's files
    segment      files of one segment while it is written          query    SQL conditions over the token table
    staging      finished segments on their way into the manifest  groups   token tables of many segments in one file
    writer       creation, resuming, appending, committing         verify   checks of all files against their records

Only `reader` needs torch.
"""
