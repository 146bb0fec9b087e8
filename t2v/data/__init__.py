"""From shards to clips: torch and webdataset's tar iterators, no Lightning. readers.py is the map of the parts."""
