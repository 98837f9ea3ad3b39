"""holdfast.daemon"""
