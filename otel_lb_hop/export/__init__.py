"""The only room that speaks OTLP: resource, metrics, records, shipper, exporters."""
