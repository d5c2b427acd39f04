"""Croissant 1.0 (MLCommons): machine-readable metadata of the parquet files, as JSON-LD."""

import json
from pathlib import Path

from dd.exports.source import Source
from dd.provenance import sha256

FORM = "http://mlcommons.org/croissant/1.0"
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs", "column": "cr:column", "conformsTo": "dct:conformsTo", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract", "field": "cr:field", "fileObject": "cr:fileObject", "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes", "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath", "key": "cr:key", "md5": "cr:md5", "parentField": "cr:parentField", "path": "cr:path",
    "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated",
    "replace": "cr:replace", "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField",
    "transform": "cr:transform",
}  # fmt: skip
PARQUET = "application/x-parquet"
FIELDS = {  # column: (type, what it is)
    "id": ("sc:Text", "Name of the sample"),
    "image": ("sc:ImageObject", "The image"),
    "mask": ("sc:ImageObject", "PNG whose pixel values are class ids (see id2label.json), 255 = uncertain"),
    "prompt": ("sc:Text", "What the image was generated from"),
    "classes": ("sc:Text", "Classes that the prompt asks for"),
    "seed": ("sc:Integer", "Seed of the sample"),
    "present": ("sc:Text", "Classes in the mask, background included"),
}


def croissant(source: Source, files: dict[str, list[str]], columns: list[str], root: Path) -> str:
    """The text of croissant.json. ``files``: {split: parquet files below ``root``}, whose hashes it holds."""
    licence = source.about["link"] or source.about["licence"] or "unknown"
    origin = "Generated images with masks" if source.about["synthetic"] else "Images with masks"
    content = {
        "@context": CONTEXT, "@type": "sc:Dataset", "conformsTo": FORM, "name": source.name,
        "description": f"{origin} of {len(source.taxonomy.names)} classes and background: {', '.join(source.taxonomy.names)}",
        "license": licence,
        "distribution": [_file(name, root) for names in files.values() for name in names] + [_set(s) for s in files],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": split, "name": split, "key": {"@id": f"{split}/id"},
             "field": [_field(split, column) for column in columns]}
            for split in files
        ],
    }  # fmt: skip
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _file(name: str, root: Path) -> dict:
    path = root / name
    return {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": PARQUET,
            "contentSize": f"{path.stat().st_size} B", "sha256": sha256(path)}  # fmt: skip


def _set(split: str) -> dict:
    return {"@type": "cr:FileSet", "@id": f"files-{split}", "name": f"files-{split}", "encodingFormat": PARQUET,
            "includes": f"data/{split}-*-of-*.parquet"}  # fmt: skip


def _field(split: str, column: str) -> dict:
    kind, text = FIELDS[column]
    found = {"fileSet": {"@id": f"files-{split}"}, "extract": {"column": column}}
    found |= {"transform": {"jsonPath": "bytes"}} if kind == "sc:ImageObject" else {}
    many = {"repeated": True} if column in ("classes", "present") else {}
    return {"@type": "cr:Field", "@id": f"{split}/{column}", "name": f"{split}/{column}", "description": text,
            "dataType": kind, **many, "source": found}  # fmt: skip
