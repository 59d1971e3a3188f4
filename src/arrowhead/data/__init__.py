"""From a source to a catalog: folders, tables, tars and object stores."""
