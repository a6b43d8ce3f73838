"""Networks in evaluation in which every layer does something, and images for them."""

import torch


@torch.no_grad()
def lively(model, seed=0):
    """``model`` in evaluation, with random norms and no parameter at zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.0, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def images(count, size, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
