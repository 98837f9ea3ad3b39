"""holdfast.protocol"""
