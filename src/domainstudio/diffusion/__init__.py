"""The mathematics of diffusion models, torch only: noise levels, output parameterisations, the variational bound."""
