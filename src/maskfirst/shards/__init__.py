"""Shards: pictures without number, segmented part by part, each part once and into one file, whatever ends in between."""
